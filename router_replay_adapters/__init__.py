"""Adapters to the training stacks: what makes each of them carry and replay our routes as they are meant.

A stack is known to its own file or folder alone, and imported by nobody but itself.
"""
