"""The project's command `r3`. Every subcommand imports what it needs when it runs."""
