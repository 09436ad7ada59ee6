"""Between a merge and the Hugging Face Hub: licences of the sources, the model card, the push."""
