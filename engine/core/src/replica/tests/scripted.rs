//! Single situations, each the story of a mistake.
