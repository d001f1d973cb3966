"""`r3`: the project's command. Every subcommand imports what it needs when it runs."""
