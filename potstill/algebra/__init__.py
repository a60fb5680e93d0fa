"""The algebra of objectives: the choices, as tables of the config. learner/ has a file that computes each."""
