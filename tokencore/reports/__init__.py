"""What is known of the markets, for people (`tables`, `plan_svg`, `doctor`) and for programs (`status`, `metrics`)."""
