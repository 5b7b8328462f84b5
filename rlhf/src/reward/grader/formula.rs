//! Arithmetic over the rewards of graders: `0.7 * facts + 0.3 * min(style, 1)`.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Longest formula, in bytes.
const MAX_LENGTH: usize = 4096;
/// Most expressions inside one another.
const MAX_DEPTH: usize = 64;

/// A formula; written as its source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Formula {
    source: String,
    root: Expression,
}

#[derive(Clone, Debug, PartialEq)]
enum Expression {
    Number(f64),
    Name(String),
    Negated(Box<Expression>),
    Both(Operator, Box<Expression>, Box<Expression>),
    Call(Function, Vec<Expression>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
    Power,
}

/// The functions of the API; `log` is the natural logarithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Function {
    Min,
    Max,
    Abs,
    Floor,
    Ceil,
    Exp,
    Sqrt,
    Log,
}

const FUNCTIONS: [(&str, Function); 8] = [
    ("min", Function::Min),
    ("max", Function::Max),
    ("abs", Function::Abs),
    ("floor", Function::Floor),
    ("ceil", Function::Ceil),
    ("exp", Function::Exp),
    ("sqrt", Function::Sqrt),
    ("log", Function::Log),
];

impl Formula {
    /// Reads a formula; the error says what is wrong where.
    pub fn new(source: impl Into<String>) -> Result<Self, String> {
        let source = source.into();
        if source.len() > MAX_LENGTH {
            return Err(format!("it is longer than {MAX_LENGTH} characters"));
        }
        let mut reader = Reader { source: &source, at: 0, depth: 0 };
        let root = reader.sum()?;
        match reader.peek() {
            None => Ok(Self { root, source }),
            Some(other) => Err(reader.wrong(format!("expected an operator, not '{other}',"))),
        }
    }

    /// As it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The names that it needs.
    pub fn names(&self) -> BTreeSet<&str> {
        let mut names = BTreeSet::new();
        self.root.collect(&mut names);
        names
    }

    /// Its value; none where a name has none. It may be infinite or no number at all, as after a division by 0.
    pub fn value(&self, of: &dyn Fn(&str) -> Option<f64>) -> Option<f64> {
        self.root.value(of)
    }
}

impl TryFrom<String> for Formula {
    type Error = String;

    fn try_from(source: String) -> Result<Self, String> {
        Self::new(source)
    }
}

impl From<Formula> for String {
    fn from(formula: Formula) -> Self {
        formula.source
    }
}

impl Expression {
    fn collect<'a>(&'a self, names: &mut BTreeSet<&'a str>) {
        match self {
            Self::Number(_) => {}
            Self::Name(name) => drop(names.insert(name)),
            Self::Negated(one) => one.collect(names),
            Self::Both(_, left, right) => {
                left.collect(names);
                right.collect(names);
            }
            Self::Call(_, all) => all.iter().for_each(|one| one.collect(names)),
        }
    }

    fn value(&self, of: &dyn Fn(&str) -> Option<f64>) -> Option<f64> {
        Some(match self {
            Self::Number(number) => *number,
            Self::Name(name) => of(name)?,
            Self::Negated(one) => -one.value(of)?,
            Self::Both(operator, left, right) => {
                let (left, right) = (left.value(of)?, right.value(of)?);
                match operator {
                    Operator::Add => left + right,
                    Operator::Subtract => left - right,
                    Operator::Multiply => left * right,
                    Operator::Divide => left / right,
                    Operator::Power => left.powf(right),
                }
            }
            Self::Call(function, all) => {
                let values = all.iter().map(|one| one.value(of)).collect::<Option<Vec<f64>>>()?;
                let first = values.first().copied()?;
                match function {
                    Function::Min => values.into_iter().fold(first, f64::min),
                    Function::Max => values.into_iter().fold(first, f64::max),
                    Function::Abs => first.abs(),
                    Function::Floor => first.floor(),
                    Function::Ceil => first.ceil(),
                    Function::Exp => first.exp(),
                    Function::Sqrt => first.sqrt(),
                    Function::Log => first.ln(),
                }
            }
        })
    }
}

struct Reader<'a> {
    source: &'a str,
    at: usize,
    depth: usize,
}

impl Reader<'_> {
    fn wrong(&self, what: impl std::fmt::Display) -> String {
        format!("{what} at character {}", self.source[..self.at].chars().count() + 1)
    }

    /// The next character that is no space.
    fn peek(&mut self) -> Option<char> {
        let rest = &self.source[self.at..];
        let rest = rest.trim_start();
        self.at = self.source.len() - rest.len();
        rest.chars().next()
    }

    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.at += wanted.len_utf8();
        }
        found
    }

    /// Terms with + and − between them.
    fn sum(&mut self) -> Result<Expression, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.wrong(format!("more than {MAX_DEPTH} expressions inside one another")));
        }
        let mut left = self.product()?;
        loop {
            let operator = if self.take('+') {
                Operator::Add
            } else if self.take('-') {
                Operator::Subtract
            } else {
                self.depth -= 1;
                return Ok(left);
            };
            left = Expression::Both(operator, Box::new(left), Box::new(self.product()?));
        }
    }

    fn product(&mut self) -> Result<Expression, String> {
        let mut left = self.signed()?;
        loop {
            let operator = if self.take('*') {
                Operator::Multiply
            } else if self.take('/') {
                Operator::Divide
            } else {
                return Ok(left);
            };
            left = Expression::Both(operator, Box::new(left), Box::new(self.signed()?));
        }
    }

    /// A sign binds less than a power: −2^2 is −4.
    fn signed(&mut self) -> Result<Expression, String> {
        let mut negative = false;
        loop {
            if self.take('-') {
                negative = !negative;
            } else if !self.take('+') {
                break;
            }
        }
        let power = self.power()?;
        Ok(if negative { Expression::Negated(Box::new(power)) } else { power })
    }

    fn power(&mut self) -> Result<Expression, String> {
        let base = self.single()?;
        if !self.take('^') {
            return Ok(base);
        }
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.wrong(format!("more than {MAX_DEPTH} expressions inside one another")));
        }
        // From the right: 2^3^2 is 2^9.
        let exponent = self.signed()?;
        self.depth -= 1;
        Ok(Expression::Both(Operator::Power, Box::new(base), Box::new(exponent)))
    }

    fn single(&mut self) -> Result<Expression, String> {
        match self.peek() {
            None => Err(self.wrong("the formula ends too early,")),
            Some('(') => {
                self.take('(');
                let inside = self.sum()?;
                if self.take(')') { Ok(inside) } else { Err(self.wrong("expected ')'")) }
            }
            Some(c) if c.is_ascii_digit() || c == '.' => self.number(),
            Some(c) if c.is_alphabetic() || c == '_' => self.named(),
            Some(c) => Err(self.wrong(format!("expected a number, a grader's name or '(', not '{c}',"))),
        }
    }

    fn number(&mut self) -> Result<Expression, String> {
        let rest = &self.source[self.at..];
        let mut end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
        // 1e-3
        if let Some(exponent) = rest[end..].strip_prefix(['e', 'E']) {
            let sign = usize::from(exponent.starts_with(['+', '-']));
            let digits = exponent[sign..].find(|c: char| !c.is_ascii_digit()).unwrap_or(exponent.len() - sign);
            if digits > 0 {
                end += 1 + sign + digits;
            }
        }
        let number: f64 = rest[..end].parse().map_err(|_| self.wrong(format!("'{}' is no number", &rest[..end])))?;
        self.at += end;
        Ok(Expression::Number(number))
    }

    fn named(&mut self) -> Result<Expression, String> {
        let rest = &self.source[self.at..];
        let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
        let name = &rest[..end];
        let began = self.at;
        self.at += end;
        if !self.take('(') {
            return Ok(Expression::Name(name.to_owned()));
        }
        let Some((_, function)) = FUNCTIONS.iter().find(|(known, _)| *known == name) else {
            self.at = began;
            let known = FUNCTIONS.map(|(known, _)| known).join(", ");
            return Err(self.wrong(format!("'{name}' is no function (there are {known}),")));
        };
        let mut arguments = vec![self.sum()?];
        while self.take(',') {
            arguments.push(self.sum()?);
        }
        if !self.take(')') {
            return Err(self.wrong("expected ',' or ')'"));
        }
        if !matches!(function, Function::Min | Function::Max) && arguments.len() > 1 {
            self.at = began;
            return Err(self.wrong(format!("'{name}' takes one number, not {},", arguments.len())));
        }
        Ok(Expression::Call(*function, arguments))
    }
}

/// Whether a formula can call a grader so.
pub fn is_name(name: &str) -> bool {
    let mut characters = name.chars();
    let first = characters.next().is_some_and(|c| c.is_alphabetic() || c == '_');
    first && characters.all(|c| c.is_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(formula: &str) -> f64 {
        let of = |name: &str| [("a", 2.0), ("b_1", 0.5)].into_iter().find(|(known, _)| *known == name).map(|(_, value)| value);
        Formula::new(formula).unwrap().value(&of).unwrap()
    }

    #[test]
    fn operators_bind_as_in_arithmetic() {
        for (formula, expected) in [
            ("1 + 2 * 3", 7.0),
            ("(1 + 2) * 3", 9.0),
            ("8 / 4 / 2", 1.0),
            ("7 - 2 - 1", 4.0),
            ("-2 ^ 2", -4.0),
            ("2 ^ 3 ^ 2", 512.0),
            ("2 ^ -1", 0.5),
            ("--1", 1.0),
            (".5*a+b_1", 1.5),
            ("1e-2 * 100", 1.0),
            ("min(a, b_1, 3) + max(a,1)", 2.5),
            ("abs(-3) + floor(1.7) + ceil(1.2)", 6.0),
            ("exp(0) + sqrt(16) + log(1)", 5.0),
            ("(a)", 2.0),
        ] {
            assert_eq!(value(formula), expected, "{formula}");
        }
        assert!(value("1 / 0").is_infinite() && value("sqrt(-1)").is_nan());
        assert_eq!(Formula::new("a + min(b, c) * a").unwrap().names().into_iter().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(Formula::new("a").unwrap().value(&|_| None), None);
    }

    #[test]
    fn what_is_no_formula_is_refused_with_the_place() {
        for (formula, part) in [
            ("", "ends too early"),
            ("1 +", "ends too early, at character 4"),
            ("1 2", "not '2', at character 3"),
            ("(1", "expected ')'"),
            ("1.2.3", "'1.2.3' is no number"),
            ("pow(1, 2)", "'pow' is no function"),
            ("sqrt(1, 2)", "takes one number"),
            ("min()", "not ')'"),
            ("a; b", "not ';'"),
            ("a ** b", "not '*'"),
        ] {
            let error = Formula::new(formula).unwrap_err();
            assert!(error.contains(part), "{formula}: {error}");
        }
        for deep in ["(".repeat(5000), "2^".repeat(2000) + "1", "-".repeat(4000) + "1", "min(".repeat(1000)] {
            // Far too deep or just long: an answer, and no overflow.
            Formula::new(deep).map(drop).ok();
        }
        assert!(Formula::new("(".repeat(80) + "1" + &")".repeat(80)).unwrap_err().contains("inside one another"));
        assert!(is_name("a_1") && !is_name("1a") && !is_name("a-b") && !is_name(""));
    }
}
