//! Golden files: a JSON beside tensors, and how numbers are compared with them.

use std::collections::BTreeMap;
use std::path::Path;

use flowtape_engine::safetensors::SafeTensors;
use flowtape_engine::{DType, Device, Tensor};
use serde_json::Value;

use crate::Outcome;

pub(crate) type Any<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A golden file pair.
pub(crate) struct Golden {
    pub(crate) json: Value,
    tensors: Option<SafeTensors>,
    device: Device,
}

impl Golden {
    pub(crate) fn open(dir: &Path, name: &str) -> Any<Self> {
        let path = dir.join(name).with_extension("json");
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let file = dir.join(name).with_extension("safetensors");
        let tensors = file.exists().then(|| SafeTensors::open(&file)).transpose()?;
        Ok(Self { json: serde_json::from_str(&text)?, tensors, device: Device::cpu() })
    }

    /// Tensors without a JSON of their own.
    pub(crate) fn tensors(dir: &Path, name: &str) -> Any<Self> {
        let tensors = Some(SafeTensors::open(dir.join(name).with_extension("safetensors"))?);
        Ok(Self { json: Value::Null, tensors, device: Device::cpu() })
    }

    /// The same with its tensors on another device.
    pub(crate) fn on(self, device: &Device) -> Self {
        Self { device: device.clone(), ..self }
    }

    pub(crate) fn tensor(&self, name: &str) -> Any<Tensor> {
        let file = self.tensors.as_ref().ok_or("no safetensors beside the JSON")?;
        Ok(file.get(name, &self.device, Some(DType::F32))?)
    }

    pub(crate) fn values(&self, name: &str) -> Any<Vec<f32>> {
        Ok(self.tensor(name)?.to_vec::<f32>()?)
    }

    /// Names of the tensors, from the JSON.
    pub(crate) fn names(&self) -> Vec<String> {
        self.json["tensors"].as_object().map(|o| o.keys().cloned().collect()).unwrap_or_default()
    }

    pub(crate) fn list(&self, key: &str) -> Any<&[Value]> {
        self.json[key].as_array().map(Vec::as_slice).ok_or_else(|| format!("no list `{key}`").into())
    }

    /// Whether there is such a tensor.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.as_ref().is_some_and(|t| t.dims(name).is_some())
    }

    /// The tensors whose names start with `prefix`, by the rest of their names.
    pub(crate) fn under(&self, prefix: &str) -> Any<BTreeMap<String, Tensor>> {
        let names = self.tensors.as_ref().map(SafeTensors::names).unwrap_or_default();
        let rest = names.iter().filter_map(|n| Some((n, n.strip_prefix(prefix)?)));
        rest.map(|(name, rest)| Ok((rest.to_owned(), self.tensor(name)?))).collect()
    }

    /// `rtol` and `atol`, for one quantity where the file tells them apart.
    pub(crate) fn tolerance(&self, quantity: &str) -> Any<Tolerance> {
        let all = &self.json["tolerance"];
        let own = if all[quantity].is_object() { &all[quantity] } else { all };
        Ok(Tolerance { rtol: number(own, "rtol")?, atol: number(own, "atol")? })
    }
}

pub(crate) fn number(value: &Value, key: &str) -> Any<f64> {
    value[key].as_f64().ok_or_else(|| format!("no number `{key}`").into())
}

pub(crate) fn text<'a>(value: &'a Value, key: &str) -> Any<&'a str> {
    value[key].as_str().ok_or_else(|| format!("no text `{key}`").into())
}

#[derive(Clone, Copy)]
pub(crate) struct Tolerance {
    pub(crate) rtol: f64,
    pub(crate) atol: f64,
}

impl Tolerance {
    /// `|a - b| <= atol + rtol |b|`, as a relative deviation: `max |a - b| / (|b| + atol / rtol)` against `rtol`.
    pub(crate) fn worst(self, got: &[f64], want: &[f64]) -> f64 {
        if got.len() != want.len() {
            return f64::INFINITY;
        }
        let floor = self.atol / self.rtol;
        got.iter().zip(want).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() / (b.abs() + floor) }).fold(0.0, max)
    }

    /// The goldens' measure of a whole tensor: `max |a - b| <= atol + rtol max |b|`, against `rtol`.
    pub(crate) fn tensor(self, case: impl Into<String>, got: &Tensor, want: &Tensor) -> Any<Outcome> {
        let (got, values) = (got.to_vec::<f64>()?, want.to_vec::<f64>()?);
        let largest = values.iter().fold(0.0, |m: f64, v| max(m, v.abs()));
        let worst =
            got.iter().zip(&values).fold(0.0, |m, (a, b)| max(m, (a - b).abs())) / (largest + self.atol / self.rtol);
        let worst = if got.len() == values.len() { worst } else { f64::INFINITY };
        Ok(Outcome::measured(case, worst, self.rtol, format!("{:?}", want.dims())))
    }

    pub(crate) fn outcome(self, case: impl Into<String>, got: &[f32], want: &[f32]) -> Outcome {
        let wide = |v: &[f32]| v.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let worst = self.worst(&wide(got), &wide(want));
        Outcome::measured(case, worst, self.rtol, format!("{} values", want.len()))
    }
}

/// The greater, where NaN is the greatest: it must not be passed over.
pub(crate) fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::INFINITY } else { a.max(b) }
}

/// Something that holds or does not.
pub(crate) fn exact(case: impl Into<String>, holds: bool, detail: impl Into<String>) -> Outcome {
    Outcome::measured(case, f64::from(u8::from(!holds)), 0.0, detail)
}

pub(crate) fn broken(case: impl Into<String>, error: &dyn std::error::Error) -> Outcome {
    Outcome::measured(case, f64::INFINITY, 0.0, error.to_string())
}

/// Runs the cases of a file or folder under a prefix; an error becomes an outcome.
pub(crate) fn collect(prefix: &str, run: impl FnOnce(&mut Vec<Outcome>) -> Any<()>) -> Vec<Outcome> {
    let mut out = Vec::new();
    if let Err(error) = run(&mut out) {
        out.push(broken("aborted", &*error));
    }
    out.into_iter().map(|o| Outcome { case: format!("{prefix}/{}", o.case), ..o }).collect()
}

/// `max |a - b| / max |b|`, the goldens' measure of whole tensors.
pub(crate) fn relative(got: &Tensor, want: &Tensor) -> Any<f64> {
    if got.dims() != want.dims() {
        return Ok(f64::INFINITY);
    }
    let (got, want) = (got.to_vec::<f64>()?, want.to_vec::<f64>()?);
    let largest = want.iter().fold(0.0, |m: f64, v| max(m, v.abs()));
    let worst = got.iter().zip(&want).fold(0.0, |m, (a, b)| max(m, (a - b).abs()));
    Ok(if largest == 0.0 { worst } else { worst / largest })
}
