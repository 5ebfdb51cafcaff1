"""Selection rules: pure functions of records and numbers. They know no log, no clock and no settings object.

The order in which they apply to a group: `margins.combined` (one reward per candidate, same sources only),
`roles.distinct` (one candidate per text), `roles.choose` and `roles.reject`, `margins.between`, `routes.route`.
Nothing here selects by the current policy's own implicit margin: such selection confirms itself and collapses.
"""
