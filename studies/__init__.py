"""Studies: what a part of Medley is good for, measured on real text over several seeds."""
