"""The scheduler's own code in virtual time, against modelled workers and agents."""
