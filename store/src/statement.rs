//! SQL text that SQLite and Postgres both take.

use sqlx::any::AnyArguments;
use sqlx::query::Query;
use sqlx::{Any, AssertSqlSafe};
use std::borrow::Cow;

/// An INSERT of several rows that skips those whose key is there already and returns the first column of those it wrote.
pub(crate) struct Insert {
    pub(crate) table: &'static str,
    /// The first is returned. A column of floating point ends in `:number`.
    pub(crate) columns: &'static [&'static str],
}

/// Numbers of rows per statement: few different texts, so that a connection's prepared statements are used again.
const SIZES: [usize; 4] = [64, 16, 4, 1];

impl Insert {
    /// `rows` in the parts that one statement each writes.
    pub(crate) fn parts<T>(rows: &[T]) -> impl Iterator<Item = &[T]> {
        let mut rest = rows;
        std::iter::from_fn(move || {
            let size = SIZES.into_iter().find(|size| *size <= rest.len())?;
            let (part, behind) = rest.split_at(size);
            rest = behind;
            Some(part)
        })
    }

    /// The statement for `rows` rows.
    pub(crate) fn text(&self, rows: usize) -> String {
        let name = |column: &&'static str| column.trim_end_matches(":number");
        let names: Vec<_> = self.columns.iter().map(name).collect();
        let mut text = format!("INSERT INTO {} ({}) VALUES ", self.table, names.join(","));
        let mut bind = 0;
        for row in 0..rows {
            text.push_str(if row == 0 { "(" } else { ",(" });
            for (index, column) in self.columns.iter().enumerate() {
                bind += 1;
                let comma = if index == 0 { "" } else { "," };
                // An absent number travels as NaN: sqlx types an absent one for Postgres as a 4-byte float, and the prepared
                // statement would then misread the 8 bytes of the next present one.
                let value =
                    if column.ends_with(":number") { format!("{comma}NULLIF(${bind},'NaN')") } else { format!("{comma}${bind}") };
                text.push_str(&value);
            }
            text.push(')');
        }
        text.push_str(" ON CONFLICT DO NOTHING RETURNING ");
        text.push_str(names[0]);
        text
    }
}

/// How an optional number is bound; see [`Insert::text`].
pub(crate) fn number(value: Option<f64>) -> f64 {
    value.unwrap_or(f64::NAN)
}

/// Postgres has no NUL in text; rather than lose the record, the character that Unicode has for such cases takes its place.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { Cow::Owned(text.replace('\0', "\u{FFFD}")) } else { Cow::Borrowed(text) }
}

/// The same for a text that may be absent.
pub(crate) fn clean_option(text: Option<&str>) -> Option<String> {
    text.map(|text| clean(text).into_owned())
}

/// `($1,$2,$3)` for `count` values, the first being `first`.
pub(crate) fn list(first: usize, count: usize) -> String {
    let places: Vec<String> = (first..first + count).map(|place| format!("${place}")).collect();
    format!("({})", places.join(","))
}

enum Value {
    Text(String),
    Integer(i64),
}

/// A SELECT whose conditions are joined by AND, each with its values.
pub(crate) struct Select {
    text: String,
    has_condition: bool,
    values: Vec<Value>,
}

impl Select {
    /// `text` is everything up to WHERE.
    pub(crate) fn new(text: &str) -> Self {
        Self { text: text.to_owned(), has_condition: false, values: Vec::new() }
    }

    fn condition(&mut self, condition: &str) {
        self.text.push_str(if self.has_condition { " AND " } else { " WHERE " });
        self.has_condition = true;
        self.text.push_str(condition);
    }

    /// A condition where `?` stands for a text, as the database would hold it.
    pub(crate) fn text(&mut self, condition: &str, value: &str) {
        self.values.push(Value::Text(clean(value).into_owned()));
        self.condition(&condition.replace('?', &format!("${}", self.values.len())));
    }

    /// The same, if there is one.
    pub(crate) fn text_option(&mut self, condition: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.text(condition, value);
        }
    }

    /// The same condition for any of the texts; none asks nothing.
    pub(crate) fn any(&mut self, condition: &str, values: &[String]) {
        if values.is_empty() {
            return;
        }
        let mut places = Vec::with_capacity(values.len());
        for value in values {
            self.values.push(Value::Text(clean(value).into_owned()));
            places.push(condition.replace('?', &format!("${}", self.values.len())));
        }
        self.condition(&format!("({})", places.join(" OR ")));
    }

    /// A condition where `?` stands for an integer.
    pub(crate) fn integer(&mut self, condition: &str, value: Option<i64>) {
        if let Some(value) = value {
            self.values.push(Value::Integer(value));
            self.condition(&condition.replace('?', &format!("${}", self.values.len())));
        }
    }

    /// A condition without a value.
    pub(crate) fn plain(&mut self, condition: &str) {
        self.condition(condition);
    }

    /// What follows the conditions.
    pub(crate) fn end(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Ready to run.
    pub(crate) fn query(&self) -> Query<'static, Any, AnyArguments> {
        let mut query = sqlx::query(AssertSqlSafe(self.text.clone()));
        for value in &self.values {
            query = match value {
                Value::Text(text) => query.bind(text.clone()),
                Value::Integer(integer) => query.bind(*integer),
            };
        }
        query
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_insert_numbers_its_places() {
        let insert = Insert { table: "t", columns: &["id", "x:number"] };
        assert_eq!(
            insert.text(2),
            "INSERT INTO t (id,x) VALUES ($1,NULLIF($2,'NaN')),($3,NULLIF($4,'NaN')) ON CONFLICT DO NOTHING RETURNING id"
        );
        let rows: Vec<usize> = (0..150).collect();
        assert_eq!(Insert::parts(&rows).map(<[usize]>::len).collect::<Vec<_>>(), [64, 64, 16, 4, 1, 1]);
        assert_eq!(Insert::parts(&rows).flatten().copied().collect::<Vec<_>>(), rows);
        assert_eq!(Insert::parts::<usize>(&[]).count(), 0);
    }

    #[test]
    fn conditions_are_joined() {
        let mut select = Select::new("SELECT 1 FROM t");
        select.text_option("a = ?", None);
        select.integer("b >= ?", Some(3));
        select.text("c = ?", "x");
        select.end(" LIMIT 1");
        assert_eq!(select.text, "SELECT 1 FROM t WHERE b >= $1 AND c = $2 LIMIT 1");
        let mut select = Select::new("SELECT 1 FROM t");
        select.any("a = ?", &[]);
        select.any("a = ?", &["x".into(), "y".into()]);
        select.text("b = ?", "z");
        assert_eq!(select.text, "SELECT 1 FROM t WHERE (a = $1 OR a = $2) AND b = $3");
    }
}
