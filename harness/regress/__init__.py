"""Did a change make anything slower? Two checkouts, or one and a stored reference, timed in turns in one job."""
