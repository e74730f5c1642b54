//! Reading fields of a JSON object: missing and null are the class default, everything else has the right type and a
//! sane size or is a typed error that names the field.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Largest width, vocabulary, number of experts or heads that is believed.
pub(super) const MAX_SIZE: usize = 1 << 24;
/// Largest number of layers that is believed; a specification is made for each.
pub(super) const MAX_LAYERS: usize = 4096;
/// Largest width of a head that is believed.
pub(super) const MAX_HEAD_DIM: usize = 1 << 16;
/// Largest position that is believed.
pub(super) const MAX_POSITION: usize = 1 << 40;

/// An object of a `config.json`, with the path to it; remembers what was asked for.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, path: &str) -> Self {
        Fields { map, path: path.into(), read: RefCell::default() }
    }

    /// The value, unless it is missing or null. Counts as read.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(name.into());
        self.map.get(name).filter(|v| !v.is_null())
    }

    /// Whether the field is there and null.
    pub(super) fn is_null(&self, name: &str) -> bool {
        self.read.borrow_mut().insert(name.into());
        self.map.get(name).is_some_and(Value::is_null)
    }

    /// Names in the object.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// Fields that nobody asked for and that are not null.
    pub(super) fn unread(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let read = self.read.borrow().clone();
        self.map.iter().filter(move |(k, v)| !v.is_null() && !read.contains(*k)).map(|(k, v)| (k.as_str(), v))
    }

    /// [`Error::Parse`] about a field.
    pub(super) fn error(&self, name: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::Parse {
            source_name: format!("config.json, field `{}{name}`", self.path),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// A whole number from `least` to `most`.
    fn integer(&self, name: &str, value: &Value, least: usize, most: usize) -> Result<usize> {
        // Numbers such as 4096.0 and 1e6 occur.
        let whole = value.as_u64().or_else(|| {
            value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..=MAX_POSITION as f64).contains(x)).map(|x| x as u64)
        });
        whole
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| (least..=most).contains(n))
            .ok_or_else(|| self.error(name, format!("a whole number from {least} to {most}"), describe(value)))
    }

    /// A whole number of at least 1.
    pub(super) fn size(&self, name: &str, default: usize) -> Result<usize> {
        self.get(name).map_or(Ok(default), |v| self.integer(name, v, 1, MAX_SIZE))
    }

    /// A whole number, possibly 0.
    pub(super) fn count(&self, name: &str, default: usize) -> Result<usize> {
        self.get(name).map_or(Ok(default), |v| self.integer(name, v, 0, MAX_SIZE))
    }

    /// The number of layers.
    pub(super) fn layers(&self, name: &str, default: usize) -> Result<usize> {
        self.get(name).map_or(Ok(default), |v| self.integer(name, v, 1, MAX_LAYERS))
    }

    /// A position or context length.
    pub(super) fn position(&self, name: &str, default: usize) -> Result<usize> {
        self.get(name).map_or(Ok(default), |v| self.integer(name, v, 1, MAX_POSITION))
    }

    /// A whole number where null does not mean the default but "none".
    pub(super) fn optional_size(&self, name: &str, missing: Option<usize>) -> Result<Option<usize>> {
        match self.get(name) {
            Some(v) => self.integer(name, v, 1, MAX_SIZE).map(Some),
            None if self.is_null(name) => Ok(None),
            None => Ok(missing),
        }
    }

    /// A size under the first of several names that is there.
    pub(super) fn size_of(&self, names: &[&str], default: usize) -> Result<usize> {
        let mut value = None;
        for name in names {
            if let Some(v) = self.get(name) {
                let n = self.integer(name, v, 0, MAX_SIZE)?;
                if let Some((other, m)) = value
                    && m != n
                {
                    return Err(self.error(name, format!("the same as `{other}` ({m})"), n.to_string()));
                }
                value = Some((*name, n));
            }
        }
        Ok(value.map_or(default, |(_, n)| n))
    }

    /// A finite number.
    pub(super) fn number(&self, name: &str, default: f64) -> Result<f64> {
        Ok(self.optional_number(name)?.unwrap_or(default))
    }

    /// A finite number or none.
    pub(super) fn optional_number(&self, name: &str) -> Result<Option<f64>> {
        self.get(name).map(|v| self.finite(name, v)).transpose()
    }

    /// A finite number above 0.
    pub(super) fn positive(&self, name: &str, default: f64) -> Result<f64> {
        let value = self.number(name, default)?;
        if value > 0.0 { Ok(value) } else { Err(self.error(name, "a positive number", value.to_string())) }
    }

    fn finite(&self, name: &str, value: &Value) -> Result<f64> {
        value.as_f64().filter(|x| x.is_finite()).ok_or_else(|| self.error(name, "a finite number", describe(value)))
    }

    /// True or false.
    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        self.get(name)
            .map_or(Ok(default), |v| v.as_bool().ok_or_else(|| self.error(name, "true or false", describe(v))))
    }

    /// A flag of which only one value is implemented.
    pub(super) fn expect_flag(&self, name: &str, only: bool) -> Result<()> {
        let value = self.flag(name, only)?;
        if value == only { Ok(()) } else { Err(self.error(name, only.to_string(), value.to_string())) }
    }

    /// A string.
    pub(super) fn word(&self, name: &str) -> Result<Option<&'a str>> {
        self.get(name).map(|v| v.as_str().ok_or_else(|| self.error(name, "a string", describe(v)))).transpose()
    }

    /// A string of which only some values are implemented.
    pub(super) fn expect_word(&self, name: &str, allowed: &[&str]) -> Result<()> {
        match self.word(name)? {
            Some(word) if !allowed.contains(&word) => {
                Err(self.error(name, one_of(allowed), describe(&Value::String(word.into()))))
            }
            _ => Ok(()),
        }
    }

    /// A number of which only one value is implemented.
    pub(super) fn expect_number(&self, name: &str, only: f64) -> Result<()> {
        let value = self.number(name, only)?;
        if value == only { Ok(()) } else { Err(self.error(name, only.to_string(), value.to_string())) }
    }

    /// An object.
    pub(super) fn object(&self, name: &str) -> Result<Option<Fields<'a>>> {
        self.get(name)
            .map(|v| {
                let map = v.as_object().ok_or_else(|| self.error(name, "an object", describe(v)))?;
                Ok(Fields::new(map, &format!("{}{name}.", self.path)))
            })
            .transpose()
    }

    fn list(&self, name: &str) -> Result<Option<&'a [Value]>> {
        self.get(name)
            .map(|v| v.as_array().map(Vec::as_slice).ok_or_else(|| self.error(name, "an array", describe(v))))
            .transpose()
    }

    /// An array of whole numbers below `end`.
    pub(super) fn indices(&self, name: &str, end: usize) -> Result<Option<Vec<usize>>> {
        let Some(list) = self.list(name)? else { return Ok(None) };
        let most = end.saturating_sub(1);
        list.iter().map(|v| self.integer(name, v, 0, most)).collect::<Result<_>>().map(Some)
    }

    /// An array of `len` finite numbers.
    pub(super) fn numbers(&self, name: &str, len: usize) -> Result<Option<Vec<f64>>> {
        let Some(list) = self.list(name)? else { return Ok(None) };
        if list.len() != len {
            return Err(self.error(name, format!("an array of {len} numbers"), format!("an array of {}", list.len())));
        }
        list.iter().map(|v| self.finite(name, v)).collect::<Result<_>>().map(Some)
    }

    /// An array of strings, one a layer, each one of `allowed`.
    pub(super) fn words(&self, name: &str, len: usize, allowed: &[&str]) -> Result<Option<Vec<&'a str>>> {
        let Some(list) = self.list(name)? else { return Ok(None) };
        if list.len() != len {
            return Err(self.error(name, format!("an array of {len} strings"), format!("an array of {}", list.len())));
        }
        list.iter()
            .map(|v| match v.as_str() {
                Some(word) if allowed.contains(&word) => Ok(word),
                _ => Err(self.error(name, one_of(allowed), describe(v))),
            })
            .collect::<Result<_>>()
            .map(Some)
    }
}

/// `"a", "b" or "c"`
pub(super) fn one_of(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|w| format!("\"{w}\"")).collect();
    match quoted.as_slice() {
        [init @ .., a, b] => init.iter().map(|w| format!("{w}, ")).collect::<String>() + &format!("{a} or {b}"),
        other => other.concat(),
    }
}

/// A value in a few words.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("an array of {}", list.len()),
        Value::Object(_) => "an object".into(),
        Value::String(s) if s.chars().count() > 60 => format!("\"{}...\"", s.chars().take(60).collect::<String>()),
        Value::String(s) => format!("\"{s}\""),
        other => other.to_string(),
    }
}
