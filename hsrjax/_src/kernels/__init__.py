"""The operations that attention is made of, and the code that runs them."""
