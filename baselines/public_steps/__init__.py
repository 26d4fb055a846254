"""Training steps that others publish, held against the judge of time: a study, and no system."""
