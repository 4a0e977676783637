"""Reports as pages: one run, and the front of several targets."""
