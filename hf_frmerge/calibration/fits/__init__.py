"""What is fitted in a block: its layers to the experts, or what a method with prompts asks for."""
