"""Methods of others that need prompts, as other equations in the same sweep: to compare a fit with."""
