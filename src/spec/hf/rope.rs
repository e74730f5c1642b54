//! Rotary embedding in its two spellings: `rope_parameters`, or `rope_theta` with `rope_scaling`.

use super::fields::{Fields, describe};
use crate::error::{Error, Result};
use crate::spec::{Rope, RopeScaling, RopeStyle};

/// What a family's classes say about its rotary embedding.
pub(super) struct RopeRules {
    pub(super) style: RopeStyle,
    /// Width of the part of a head that `partial_rotary_factor` is taken of.
    pub(super) head_dim: usize,
    /// `rope_theta` where there is none.
    pub(super) theta: f64,
    /// `max_position_embeddings`.
    pub(super) max_position: usize,
    /// `partial_rotary_factor` where there is none; `None`: the family turns whole heads.
    pub(super) partial: Option<f64>,
    /// The scaling where there is no object at all (gpt-oss).
    pub(super) scaling: Option<Rope>,
    /// The longrope of Phi: its factors on cos and sin are `short_mscale` and `long_mscale`.
    pub(super) phi: bool,
}

impl RopeRules {
    pub(super) fn new(style: RopeStyle, head_dim: usize, theta: f64, max_position: usize) -> Self {
        RopeRules { style, head_dim, theta, max_position, partial: None, scaling: None, phi: false }
    }
}

/// A rotary embedding with what goes along.
pub(super) struct RopeRead {
    pub(super) rope: Rope,
    /// The rotary embedding for sequences beyond so many positions (longrope).
    pub(super) long: Option<(usize, Rope)>,
    /// DeepSeek's factor on the softmax scale.
    pub(super) softmax_factor: f64,
}

/// Keys that the object may have beside its type and theta.
fn keys(kind: &str, phi: bool) -> &'static [&'static str] {
    match kind {
        "linear" | "dynamic" => &["factor"],
        "yarn" => &[
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "finetuned",
        ],
        "llama3" => &["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"],
        "longrope" if phi => {
            &["original_max_position_embeddings", "short_factor", "long_factor", "short_mscale", "long_mscale"]
        }
        "longrope" => {
            &["factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"]
        }
        _ => &[],
    }
}

/// YaRN's temperature: `0.1 * m * ln(factor) + 1` for factors above 1.
fn mscale(factor: f64, m: f64) -> f64 {
    if factor > 1.0 { 0.1 * m * factor.ln() + 1.0 } else { 1.0 }
}

/// Reads the rotary embedding of a model.
pub(super) fn read(f: &Fields, rules: &RopeRules) -> Result<RopeRead> {
    let (new, old) = (f.object("rope_parameters")?, f.object("rope_scaling")?);
    if new.is_some() && old.is_some() && f.get("rope_parameters") != f.get("rope_scaling") {
        return Err(f.error("rope_scaling", "none next to `rope_parameters`", "both"));
    }
    let object = new.or(old);
    let theta = match object.as_ref().map(|o| o.optional_number("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => f.number("rope_theta", rules.theta)?,
    };
    if theta <= 1.0 {
        return Err(f.error("rope_theta", "a number above 1", theta.to_string()));
    }
    let rotary_dim = rotary_dim(f, object.as_ref(), rules)?;
    let mut rope = Rope::new(rules.style, rotary_dim, theta);
    let plain = |rope| Ok(RopeRead { rope, long: None, softmax_factor: 1.0 });
    let Some(o) = object.filter(|o| o.names().next().is_some()) else {
        if let Some(scaled) = &rules.scaling {
            rope.scaling = scaled.scaling.clone();
            rope.cos_sin_scale = scaled.cos_sin_scale;
        }
        return plain(rope);
    };
    let kind = match (o.word("rope_type")?, o.word("type")?) {
        (Some(a), Some(b)) if a != b => return Err(o.error("type", format!("\"{a}\" as in `rope_type`"), b)),
        (a, b) => a.or(b).unwrap_or("default"),
    };
    const KINDS: &str = "\"default\", \"linear\", \"yarn\", \"llama3\" or \"longrope\"";
    if !matches!(kind, "default" | "linear" | "dynamic" | "yarn" | "llama3" | "longrope") {
        let name = if o.get("rope_type").is_some() { "rope_type" } else { "type" };
        return Err(o.error(name, KINDS, describe(&kind.into())));
    }
    let common = ["rope_theta", "rope_type", "type", "partial_rotary_factor"];
    for (key, value) in o.unread() {
        if !common.contains(&key) && !keys(kind, rules.phi).contains(&key) {
            return Err(o.error(key, format!("no such parameter of rope type \"{kind}\""), describe(value)));
        }
    }
    if rules.phi && !matches!(kind, "default" | "longrope") {
        return Err(o.error("type", "\"default\" or \"longrope\" for this model", format!("\"{kind}\"")));
    }
    let required = |name: &str| -> Result<f64> {
        match o.optional_number(name)? {
            Some(x) if x > 0.0 => Ok(x),
            Some(x) => Err(o.error(name, "a positive number", x.to_string())),
            None => Err(o.error(name, format!("a number for rope type \"{kind}\""), "nothing")),
        }
    };
    // The configuration's own field comes before the one of the object, as in the package.
    let original = || -> Result<usize> {
        let inside = o.position("original_max_position_embeddings", rules.max_position)?;
        f.position("original_max_position_embeddings", inside)
    };
    match kind {
        "default" => plain(rope),
        "linear" => {
            rope.scaling = RopeScaling::linear(required("factor")?);
            plain(rope)
        }
        "yarn" => {
            let original = original()? as f64;
            let factor = match o.get("factor") {
                Some(_) => required("factor")?,
                None => rules.max_position as f64 / original,
            };
            // 0 means the default, as in the package.
            let beta = |name, default| match o.number(name, default) {
                Ok(0.0) => Ok(default),
                other => other,
            };
            let (fast, slow) = (beta("beta_fast", 32.0)?, beta("beta_slow", 1.0)?);
            rope.scaling = RopeScaling::yarn(factor, original, fast, slow, o.flag("truncate", true)?);
            let (m, all) = (o.number("mscale", 0.0)?, o.number("mscale_all_dim", 0.0)?);
            rope.cos_sin_scale = match o.optional_number("attention_factor")? {
                Some(scale) => scale,
                None if m != 0.0 && all != 0.0 => mscale(factor, m) / mscale(factor, all),
                None => mscale(factor, 1.0),
            };
            let softmax_factor = if all != 0.0 { mscale(factor, all).powi(2) } else { 1.0 };
            Ok(RopeRead { rope, long: None, softmax_factor })
        }
        "llama3" => {
            let (factor, low, high) =
                (required("factor")?, required("low_freq_factor")?, required("high_freq_factor")?);
            rope.scaling = RopeScaling::llama3(factor, low, high, original()? as f64);
            plain(rope)
        }
        "longrope" => {
            let original = original()?;
            let factors = |name: &str| -> Result<Vec<f64>> {
                o.numbers(name, rotary_dim / 2)?.ok_or_else(|| o.error(name, "an array of numbers", "nothing"))
            };
            let (short, long) = (factors("short_factor")?, factors("long_factor")?);
            let factor = match o.get("factor") {
                Some(_) => required("factor")?,
                None => rules.max_position as f64 / original as f64,
            };
            let (short_scale, long_scale) = if rules.phi {
                (required("short_mscale")?, required("long_mscale")?)
            } else {
                let scale = match o.optional_number("attention_factor")? {
                    Some(scale) => scale,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
                };
                (scale, scale)
            };
            let with = |factors, cos_sin_scale| Rope {
                scaling: RopeScaling::long_rope(factors),
                cos_sin_scale,
                ..rope.clone()
            };
            let long = Some((original, with(long, long_scale)));
            Ok(RopeRead { rope: with(short, short_scale), long, softmax_factor: 1.0 })
        }
        _ => Err(Error::unsupported(
            "the config.json reader",
            "rope type \"dynamic\": its frequencies change with the length of the sequence",
        )),
    }
}

/// `int(head_dim * partial_rotary_factor)`.
fn rotary_dim(f: &Fields, object: Option<&Fields>, rules: &RopeRules) -> Result<usize> {
    let inside = object.map(|o| o.optional_number("partial_rotary_factor")).transpose()?.flatten();
    let outside = f.optional_number("partial_rotary_factor")?;
    let Some(default) = rules.partial else {
        return match inside.or(outside) {
            Some(x) if x != 1.0 => Err(f.error("partial_rotary_factor", "1 for this model", x.to_string())),
            _ => Ok(rules.head_dim),
        };
    };
    let factor = inside.or(outside).unwrap_or(default);
    if !(factor > 0.0 && factor <= 1.0) {
        return Err(f.error("partial_rotary_factor", "above 0 and at most 1", factor.to_string()));
    }
    Ok((rules.head_dim as f64 * factor) as usize)
}
