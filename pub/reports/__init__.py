"""Reports on the markets, for people (`tables`, `plan_svg`, `doctor`) and for programs (`status`, `metrics`)."""
