"""What the loops of both stages share so that nothing is lost: checkpoints, seeds, and stopping when asked to."""
