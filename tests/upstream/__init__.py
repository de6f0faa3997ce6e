"""What is changed in Megatron and torch: the declarations, and the behaviour that each change rests on."""
