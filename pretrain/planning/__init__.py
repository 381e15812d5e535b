"""Whether a run fits: memory and communication of a recipe by ZeRO stage, before a GPU is asked for."""
