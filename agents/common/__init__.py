"""What the algorithms share: losses, advantages, batches, rollouts."""
