"""Files: written atomically, downloaded, and checkpoints read without running code from them."""
