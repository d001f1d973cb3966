"""A package of its own name: an installed package ships a `tests`, too, and would be found before a folder."""
