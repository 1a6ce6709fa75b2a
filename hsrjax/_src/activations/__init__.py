"""What turns scores into weights, and which keys may be left out."""
