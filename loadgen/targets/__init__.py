"""Systems that agents can be run against: one module each, behind `base.Target`."""
