"""Ways in which the gradients of several losses reach the trunk."""
