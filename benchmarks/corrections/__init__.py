"""What the corrections of the policy gradient are worth, where the gradient is known."""
