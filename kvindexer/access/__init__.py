"""Who may do what: identities, their roles, and the ways in which callers say who they are."""
