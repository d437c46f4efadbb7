"""The quickstart's world: a village of facts, the datasets about it, and a gold judge that knows the truth."""
