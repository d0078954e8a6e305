"""What a model is: its files, its skeleton, its stacks of blocks, and the text it is calibrated on."""
