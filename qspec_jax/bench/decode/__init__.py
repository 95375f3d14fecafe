"""``bench decode``: steps, drafts, verifications and cycles in the generation loop."""
