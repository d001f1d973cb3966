"""How the expert ids of one token become a row of fixed width, and back."""
