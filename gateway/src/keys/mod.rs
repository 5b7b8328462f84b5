//! API keys beyond a name and scopes: remembered while the database is away, described in requests and on the command line.

mod ring;
mod spec;

pub use ring::{KeyRing, Known};
pub use spec::{KeySpec, LIMITS, check_name, dollars, parse_moment, set_limit, span};
