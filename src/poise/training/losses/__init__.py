"""What is added to the loss, and what tells how far it has worked."""
