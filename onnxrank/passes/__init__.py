"""The steps of `optimize`: what one of them hands on to the next is a `Job`, and each pass has a module."""
