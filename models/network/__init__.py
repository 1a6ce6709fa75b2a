"""A decoder-only transformer whose attention is hsrjax; it knows no file format."""
