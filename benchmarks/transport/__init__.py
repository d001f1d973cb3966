"""What it costs to bring a request's routes from the scheduler to a trainer's rank."""
