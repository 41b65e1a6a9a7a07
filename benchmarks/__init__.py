"""What is measured, how, and the records of it in `results/`."""
