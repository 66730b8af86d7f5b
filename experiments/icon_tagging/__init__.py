"""The paper's comparison and the ablations of the recipe on icon-tagging; see `README.md` in this folder."""
