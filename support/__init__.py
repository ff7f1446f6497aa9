"""What any careful training script needs; utils.py holds what the paper needs."""
