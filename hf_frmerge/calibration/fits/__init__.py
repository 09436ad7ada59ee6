"""What is fitted in a block and behind the blocks: layers to what they give in the experts."""
