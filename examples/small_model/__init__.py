"""How the small model of the tests and the demo was trained; the checkpoint is in `checkpoint/`."""
