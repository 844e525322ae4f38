"""Conversations -> text -> token ids and what each token is. The only renderer."""
