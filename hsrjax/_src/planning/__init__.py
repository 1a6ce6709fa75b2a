"""What a call will cost, and therefore how it is carried out."""
