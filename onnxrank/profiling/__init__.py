"""Times models over the number of candidates and tells where the time goes."""
