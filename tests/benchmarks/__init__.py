"""What measures is tested too, as far as it takes no GPU."""
