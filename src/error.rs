//! The one error type: it names the argument, what was expected and what was found.

/// Result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. When a function returns an error, it has written nothing.
///
/// Every message names the argument (or option, or file) with what was expected and what was found.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A slice is shorter than its shape and strides ask for, or a flat array has the wrong length.
    #[error("`{argument}` has {found} elements, its shape asks for {expected}")]
    Len {
        /// Name of the argument.
        argument: String,
        /// Elements that the shape asks for.
        expected: usize,
        /// Elements that are there.
        found: usize,
    },
    /// An array has the wrong shape.
    #[error("`{argument}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name of the argument.
        argument: String,
        /// Shape that the specification asks for.
        expected: Vec<usize>,
        /// Shape that was given.
        found: Vec<usize>,
    },
    /// Strides that no function takes: a last dimension that is not contiguous, or rows of an output that overlap.
    #[error("`{argument}` has strides {found:?}, expected {expected}")]
    Stride {
        /// Name of the argument.
        argument: String,
        /// The rule that is broken.
        expected: String,
        /// Strides that were given, in elements.
        found: Vec<usize>,
    },
    /// A value is outside its range: an option of a specification, a prefix sum that decreases, a page that does not exist.
    #[error("`{argument}` is {found}, expected {expected}")]
    Value {
        /// Name of the argument or option.
        argument: String,
        /// The range or rule.
        expected: String,
        /// The value that was given.
        found: String,
    },
    /// An optional argument is missing although the specification asks for it, or given although it does not.
    #[error("`{argument}` is {found}, expected it to be {expected}")]
    Presence {
        /// Name of the argument.
        argument: String,
        /// `"given"` or `"absent"`, with the reason.
        expected: String,
        /// `"given"` or `"absent"`.
        found: String,
    },
    /// Two arguments share memory although one of them is written.
    #[error("`{argument}` overlaps `{other}`, expected separate memory")]
    Overlap {
        /// Name of the output.
        argument: String,
        /// Name of the other argument.
        other: String,
    },
    /// An element type that this function or weight does not take.
    #[error("`{argument}` has element type {found}, expected {expected}")]
    Dtype {
        /// Name of the argument.
        argument: String,
        /// Types that are taken.
        expected: String,
        /// The type that was given.
        found: String,
    },
    /// The case is part of the vocabulary, but this backend does not have it.
    #[error("unsupported by {backend}: {case}")]
    Unsupported {
        /// The backend, or the reader.
        backend: String,
        /// The case.
        case: String,
    },
    /// Text that is not what it should be: JSON of a specification, a model's `config.json`.
    #[error("cannot read {source_name}: expected {expected}, found {found}")]
    Parse {
        /// What was read, down to the field.
        source_name: String,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// There is no usable device of the kind asked for: no driver library, a driver too old, no device visible.
    #[error("no {device} device: expected {expected}, found {found}")]
    NoDevice {
        /// `"CUDA"`.
        device: String,
        /// What is needed.
        expected: String,
        /// What the machine has.
        found: String,
    },
    /// The device driver refused a call. `log` holds the compiler's words where a kernel was being loaded.
    #[error("`{call}` failed for {argument}: expected success, found {found}{}{log}", if log.is_empty() { "" } else { "\n" })]
    Driver {
        /// The driver's function.
        call: String,
        /// Kernel, module or buffer the call was about.
        argument: String,
        /// The driver's error.
        found: String,
        /// The compiler's log, or empty.
        log: String,
    },
}

impl Error {
    /// [`Error::Value`] with everything turned into text.
    pub(crate) fn value(
        argument: impl Into<String>,
        expected: impl Into<String>,
        found: impl std::fmt::Display,
    ) -> Self {
        Error::Value { argument: argument.into(), expected: expected.into(), found: found.to_string() }
    }

    /// [`Error::Unsupported`] of a backend.
    pub(crate) fn unsupported(backend: &str, case: impl Into<String>) -> Self {
        Error::Unsupported { backend: backend.into(), case: case.into() }
    }

    /// [`Error::Presence`]: `argument` is absent although `reason` asks for it.
    pub(crate) fn missing(argument: &str, reason: &str) -> Self {
        Error::Presence { argument: argument.into(), expected: format!("given: {reason}"), found: "absent".into() }
    }

    /// [`Error::Presence`]: `argument` is given although `reason` forbids it.
    pub(crate) fn unexpected(argument: &str, reason: &str) -> Self {
        Error::Presence { argument: argument.into(), expected: format!("absent: {reason}"), found: "given".into() }
    }
}

/// `Ok` if a flat array has exactly `expected` elements.
pub(crate) fn check_len(argument: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Len { argument: argument.into(), expected, found }) }
}

/// Gives back an argument that is there exactly where it is `wanted`; otherwise says why it should be given, or absent.
pub(crate) fn check_presence<T>(
    argument: &str,
    given: Option<T>,
    wanted: bool,
    [missing, unexpected]: [&str; 2],
) -> Result<Option<T>> {
    match (&given, wanted) {
        (None, true) => Err(Error::missing(argument, missing)),
        (Some(_), false) => Err(Error::unexpected(argument, unexpected)),
        _ => Ok(given),
    }
}

/// Why an argument should be given, and why absent: the same words wherever its memory is.
pub(crate) mod why {
    pub(crate) const GATE: [&str; 2] = ["the block is gated", "the block is plain"];
    pub(crate) const BLOCK_BIAS: [&str; 2] = ["the block has this bias", "the block has no such bias"];
    pub(crate) const MIXTURE_BIAS: [&str; 2] = ["the mixture has this bias", "the mixture has no such bias"];
    pub(crate) const SHARED: [&str; 2] = ["the mixture has a shared expert", "the mixture has no shared expert"];
    pub(crate) const SHARED_GATE: [&str; 2] = ["the shared expert has a gate", "the shared expert has no gate"];
    pub(crate) const NORM_BIAS: [&str; 2] = ["the norm has one", "the norm has none"];
    pub(crate) const ALIBI: [&str; 2] = ["the specification has ALiBi", "the specification has no ALiBi"];
    pub(crate) const RELATIVE_BIAS: [&str; 2] = ["the specification has a relative bias", "the specification has none"];
    pub(crate) const SINKS: [&str; 2] = ["the specification has sinks", "the specification has none"];
    pub(crate) const PLAN: [&str; 2] = ["the plan has it", "the plan has none"];
}
