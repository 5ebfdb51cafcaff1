"""Selection rules: pure functions from rewards to roles, margins and routes."""
