//! Lists in pages, by id: ids sort by time.

/// Which end of time comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The latest first.
    #[default]
    NewestFirst,
    /// The earliest first.
    OldestFirst,
}

/// Most items that one page holds, whatever was asked for.
pub const MAX_PAGE: usize = 1000;

/// Some items of a list; the id of the last one, given as `after`, fetches the next.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    /// In the order that was asked for.
    pub items: Vec<T>,
    /// There are more behind these.
    pub has_more: bool,
}

impl<T> Page<T> {
    /// Of one item more than `limit`, which only says that there is one.
    pub(crate) fn of(mut items: Vec<T>, limit: usize) -> Self {
        let has_more = items.len() > limit;
        items.truncate(limit);
        Self { items, has_more }
    }
}

impl Order {
    pub(crate) fn after(self, column: &str) -> String {
        match self {
            Self::NewestFirst => format!("{column} < ?"),
            Self::OldestFirst => format!("{column} > ?"),
        }
    }

    pub(crate) fn sql(self) -> &'static str {
        match self {
            Self::NewestFirst => "DESC",
            Self::OldestFirst => "ASC",
        }
    }
}

/// 20 unless asked, within what a page may hold.
pub(crate) fn limit(asked: Option<usize>) -> usize {
    asked.unwrap_or(20).clamp(1, MAX_PAGE)
}
