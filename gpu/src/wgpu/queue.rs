//! Commands: kernels are recorded one after the other and submitted many at once.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use ::wgpu::{
    BindGroupDescriptor, BindGroupEntry, BindGroupLayout, BindGroupLayoutDescriptor, BindGroupLayoutEntry,
    BindingResource, BindingType, BufferBinding, BufferBindingType, BufferDescriptor, BufferUsages, CommandEncoder,
    CommandEncoderDescriptor, ComputePass, ComputePassDescriptor, ComputePipeline, ComputePipelineDescriptor, Device,
    ErrorFilter, PipelineLayoutDescriptor, PollType, Queue, ShaderModuleDescriptor, ShaderRuntimeChecks, ShaderSource,
    ShaderStages, SubmissionIndex,
};
use flowtape_engine::pool::{Pool, Pooled};
use flowtape_engine::{DType, Error, Result};
use futures_channel::oneshot;

use super::matmul::Cooperative;
use super::memory::{Block, Memory};
use super::platform::{guarded, wait};
use super::pointwise::Body;
use super::tuning::Tuning;
use super::view::{Access, BindingLimits, View};
use super::wgsl;

/// Kernels of a submission.
const KERNELS: usize = 256;
/// Bytes of the parameters of a submission.
const PARAMS: u64 = 256 << 10;

/// What was asked of a device, or what it has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) binding: BindingLimits,
    /// Storage buffers of a kernel.
    pub(super) bindings: usize,
    /// Workgroups along an axis.
    pub(super) workgroups: u32,
    /// Bytes of workgroup memory.
    pub(super) shared: usize,
    /// What the start of a uniform binding is a multiple of.
    pub(super) uniform: u64,
}

impl Bounds {
    pub(super) fn of(limits: &::wgpu::Limits) -> Self {
        Self {
            binding: BindingLimits {
                // Elements are counted in u32.
                size: limits.max_storage_buffer_binding_size.min(1 << 32) / 16 * 16,
                alignment: limits.min_storage_buffer_offset_alignment.into(),
            },
            bindings: limits.max_storage_buffers_per_shader_stage as usize,
            workgroups: limits.max_compute_workgroups_per_dimension,
            shared: limits.max_compute_workgroup_storage_size as usize,
            uniform: limits.min_uniform_buffer_offset_alignment.into(),
        }
    }
}

/// What kernels may make use of where it is there.
#[derive(Clone, Debug, Default)]
pub(super) struct Abilities {
    /// Workgroups that keep it busy.
    pub(super) busy: usize,
    pub(super) subgroups: bool,
    /// Those offered; which of them are used is in [`Gpu::cooperative`].
    pub(super) cooperative: Vec<Cooperative>,
}

/// What tells one kernel from another: its name, what its text depends on, and how its operands are bound.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Key {
    name: &'static str,
    shape: Vec<u64>,
    operands: Vec<(usize, DType, Access)>,
    written: Vec<(bool, bool)>,
    params: usize,
}

/// A kernel to run.
pub(super) struct Launch<'a> {
    /// Its name in errors and in the cache.
    pub(super) name: &'static str,
    /// What its text depends on, beside the operands' dtypes.
    pub(super) shape: Vec<u64>,
    pub(super) operands: &'a [(&'a View, Access)],
    /// Parameters after the operands' offsets.
    pub(super) params: &'a [u32],
    pub(super) workgroups: usize,
}

#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) pass: Option<ComputePass<'static>>,
    pub(super) encoder: Option<CommandEncoder>,
    params: Vec<u8>,
    kernels: usize,
    pub(super) number: u64,
    /// Reads that the next submission copies.
    pub(super) reads: Vec<Arc<OnceLock<SubmissionIndex>>>,
    counts: Counts,
}

/// What has gone wrong behind our back.
#[derive(Debug, Default)]
struct Health(Mutex<Option<Error>>);

impl Health {
    fn set(&self, error: Error) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}

/// Inputs that a kernel's bindings hold.
pub(super) struct Packed {
    pub(super) inputs: Vec<View>,
    _memory: Option<Pooled<Memory>>,
}

/// The first words of a block.
pub(super) fn words(block: &Arc<Block>, len: usize) -> View {
    View::plain(block, DType::U32, &[len])
}

/// A device, its memory and its commands.
#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) device: Device,
    pub(super) queue: Queue,
    pub(super) name: String,
    pub(super) bounds: Bounds,
    pub(super) abilities: Abilities,
    pub(super) tuning: Tuning,
    /// Cooperative matrices that were found to multiply.
    pub(super) cooperative: OnceLock<Vec<Cooperative>>,
    pub(super) pool: Pool<Memory>,
    /// A word: one more than the largest index that was past the end of its table, 0 for none.
    pub(super) fault: Pooled<Memory>,
    params: ::wgpu::Buffer,
    pub(super) batch: Mutex<Batch>,
    kernels: Mutex<HashMap<Key, Arc<ComputePipeline>>>,
    layouts: Mutex<HashMap<Vec<bool>, BindGroupLayout>>,
    health: Arc<Health>,
    pub(super) reads: AtomicU64,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn failed(device: &str, what: impl ToString) -> Error {
    Error::DeviceFailed { device: device.into(), what: what.to_string() }
}

impl Gpu {
    pub(super) fn new(
        (device, queue): (Device, Queue),
        name: String,
        bounds: Bounds,
        abilities: Abilities,
        tuning: Tuning,
    ) -> Result<Self> {
        let health = Arc::new(Health::default());
        let (to, called) = (health.clone(), name.clone());
        device.on_uncaptured_error(Arc::new(move |e: ::wgpu::Error| to.set(failed(&called, e))));
        let (to, called) = (health.clone(), name.clone());
        device.set_device_lost_callback(move |_, message| {
            to.set(failed(&called, format!("the device was lost: {message}")));
        });
        let params = device.create_buffer(&BufferDescriptor {
            label: Some("parameters"),
            size: PARAMS,
            usage: BufferUsages::UNIFORM | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let pool = super::memory::pool(&device, &name, device.limits().max_buffer_size);
        let batch = Mutex::new(Batch { number: 1, ..Batch::default() });
        let (kernels, layouts) = (Mutex::default(), Mutex::default());
        let fault = pool.alloc(4)?;
        queue.write_buffer(&fault.block().buffer, 0, &[0; 4]);
        Ok(Self {
            device,
            queue,
            name,
            bounds,
            abilities,
            tuning,
            cooperative: OnceLock::new(),
            pool,
            fault,
            params,
            batch,
            kernels,
            layouts,
            health,
            reads: AtomicU64::new(0),
        })
    }

    /// An error that came up since the device was opened; from then on nothing it computes counts.
    pub(super) fn check(&self) -> Result<()> {
        match &*lock(&self.health.0) {
            Some(error) => Err(failed(&self.name, error)),
            None => Ok(()),
        }
    }

    /// Memory of the pool. What recorded kernels still use is waited for before there is none left.
    pub(super) fn alloc(&self, bytes: usize) -> Result<Pooled<Memory>> {
        self.check()?;
        match self.pool.alloc(bytes) {
            Err(Error::OutOfMemory { .. }) => {
                self.finish()?;
                self.pool.alloc(bytes)
            }
            other => other,
        }
    }

    /// The word that keeps indices past the end of their tables.
    pub(super) fn fault(&self) -> View {
        words(self.fault.block(), 1)
    }

    /// Scratch memory of f32 values.
    pub(super) fn scratch(&self, dims: &[usize]) -> Result<(Pooled<Memory>, View)> {
        let memory = self.alloc(dims.iter().product::<usize>() * 4).map_err(|error| match error {
            Error::OutOfMemory { device, bytes, reason } => {
                Error::OutOfMemory { device, bytes, reason: format!("partial results, f32 {dims:?}; {reason}") }
            }
            other => other,
        })?;
        let view = View::plain(memory.block(), DType::F32, dims);
        Ok((memory, view))
    }

    /// Whether one kernel can hold these operands.
    pub(super) fn holds(&self, views: &[&View]) -> bool {
        let mut blocks: Vec<_> = views.iter().map(|v| Arc::as_ptr(&v.block)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks.len() <= self.bounds.bindings && views.iter().all(|v| self.bounds.binding.fits(v))
    }

    /// The inputs, some of them copied side by side into one block where they and the outputs are more than a kernel's
    /// bindings.
    pub(super) fn packed(&self, inputs: &[View], outputs: &[View]) -> Result<Packed> {
        let views: Vec<&View> = inputs.iter().chain(outputs).collect();
        let mut out = Packed { inputs: inputs.to_vec(), _memory: None };
        if self.holds(&views) {
            return Ok(out);
        }
        let spans: Vec<usize> = inputs.iter().map(|v| ((v.span().1 - v.span().0) / 4) as usize).collect();
        let movable = |i: &usize| !outputs.iter().any(|o| Arc::ptr_eq(&o.block, &inputs[*i].block));
        let mut order: Vec<usize> = (0..inputs.len()).filter(movable).collect();
        order.sort_by_key(|i| spans[*i]);
        let (memory, block) = self.scratch(&[order.iter().map(|i| spans[*i]).sum()])?;
        let mut start = 0;
        for i in order {
            let (view, len) = (&inputs[i], spans[i]);
            let from = View { offset: (view.span().0 / 4) as usize, ..words(&view.block, len) };
            let to = View { offset: start, ..words(&block.block, len) };
            super::pointwise::run(self, Body::Copy, &[from], &[], &[to])?;
            let per_word = 4 / view.dtype.size();
            let offset = start * per_word + view.offset - (view.span().0 as usize / view.dtype.size());
            out.inputs[i] = View { block: block.block.clone(), offset, ..view.clone() };
            start += len;
            let views: Vec<&View> = out.inputs.iter().chain(outputs).collect();
            if self.holds(&views) {
                break;
            }
        }
        out._memory = Some(memory);
        Ok(out)
    }

    fn layout(&self, written: &[bool]) -> BindGroupLayout {
        let entry = |binding: usize, ty: BufferBindingType| BindGroupLayoutEntry {
            binding: binding as u32,
            visibility: ShaderStages::COMPUTE,
            ty: BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let make = || {
            let storage = written.iter().enumerate();
            let storage = storage.map(|(i, w)| entry(i + 1, BufferBindingType::Storage { read_only: !w }));
            let entries: Vec<_> = [entry(0, BufferBindingType::Uniform)].into_iter().chain(storage).collect();
            self.device.create_bind_group_layout(&BindGroupLayoutDescriptor { label: None, entries: &entries })
        };
        lock(&self.layouts).entry(written.to_vec()).or_insert_with(make).clone()
    }

    fn compile(&self, name: &str, source: &str, layout: &BindGroupLayout) -> Result<Arc<ComputePipeline>> {
        let text = ShaderModuleDescriptor { label: Some(name), source: ShaderSource::Wgsl(source.into()) };
        // Checks inside of kernels cost a comparison for each access to a tile and a counter for each loop.
        let unchecked =
            ShaderRuntimeChecks { bounds_checks: false, force_loop_bounding: false, ..ShaderRuntimeChecks::checked() };
        let make = || {
            // SAFETY: the texts are our own. Positions come from shapes, whose reach `launch` compares with the memory,
            // or from indices that the kernels compare with the tables' sizes; every loop counts up to a size.
            let module = unsafe { self.device.create_shader_module_trusted(text, unchecked) };
            let layout = self.device.create_pipeline_layout(&PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(layout)],
                immediate_size: 0,
            });
            self.device.create_compute_pipeline(&ComputePipelineDescriptor {
                label: Some(name),
                layout: Some(&layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: ::wgpu::PipelineCompilationOptions {
                    // All kernels write their workgroup memory before they read it.
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: None,
            })
        };
        match guarded(&self.device, &[ErrorFilter::Validation], make) {
            (_, Some(error)) => Err(failed(&self.name, format!("the kernel {name} does not compile: {error}"))),
            (pipeline, None) => Ok(Arc::new(pipeline)),
        }
    }

    /// Records a kernel. `body` prints what follows the declarations, where the kernel is not known yet.
    pub(super) fn launch(&self, launch: &Launch<'_>, body: impl FnOnce() -> String) -> Result<()> {
        self.launch_with("", launch, body)
    }

    /// The same of a text that begins with directives.
    pub(super) fn launch_with(
        &self,
        directives: &str,
        launch: &Launch<'_>,
        body: impl FnOnce() -> String,
    ) -> Result<()> {
        let Launch { name, shape, operands, params, workgroups } = launch;
        if *workgroups == 0 {
            return Ok(());
        }
        self.check()?;
        // Kernels run without checks of their own: what they compute from shapes must lie in memory.
        if let Some((view, _)) = operands.iter().find(|(v, _)| v.span().1 > v.block.buffer.size()) {
            let (expected, got) = (format!("operands within {} bytes", view.block.buffer.size()), view.span());
            return Err(Error::argument(name, expected, got));
        }
        let plan = self.bounds.binding.plan(operands);
        let written: Vec<bool> = plan.bindings.iter().map(|b| b.written).collect();
        let layout = self.layout(&written);
        let count = operands.len() + params.len();
        let key = Key {
            name,
            shape: shape.clone(),
            operands: operands.iter().zip(&plan.places).map(|((v, a), p)| (*p, v.dtype, *a)).collect(),
            written: plan.bindings.iter().map(|b| (b.written, b.atomic)).collect(),
            params: count,
        };
        let known = lock(&self.kernels).get(&key).cloned();
        let pipeline = match known {
            Some(pipeline) => pipeline,
            None => {
                let source = directives.to_owned() + &wgsl::header(operands, &plan, count) + &body();
                let pipeline = self.compile(name, &source, &layout)?;
                lock(&self.kernels).insert(key, pipeline.clone());
                pipeline
            }
        };
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&plan.offsets).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(params));
        bytes.resize(bytes.len().max(4).next_multiple_of(16), 0);
        let size = bytes.len() as u64;

        let mut batch = lock(&self.batch);
        let start = (batch.params.len() as u64).next_multiple_of(self.bounds.uniform);
        let start = if batch.kernels >= KERNELS || start + size > PARAMS {
            self.submit(&mut batch);
            0
        } else {
            start
        };
        batch.params.resize(start as usize, 0);
        batch.params.extend(bytes);
        plan.bindings.iter().for_each(|b| b.block.use_in(batch.number));
        let window = |buffer, offset, size| {
            BindingResource::Buffer(BufferBinding { buffer, offset, size: std::num::NonZeroU64::new(size) })
        };
        let parameters = BindGroupEntry { binding: 0, resource: window(&self.params, start, size) };
        let storage = plan.bindings.iter().enumerate().map(|(i, b)| BindGroupEntry {
            binding: i as u32 + 1,
            resource: window(&b.block.buffer, b.start, b.end - b.start),
        });
        let entries: Vec<_> = [parameters].into_iter().chain(storage).collect();
        let group = self.device.create_bind_group(&BindGroupDescriptor {
            label: Some(name),
            layout: &layout,
            entries: &entries,
        });
        let Batch { pass, encoder, kernels, .. } = &mut *batch;
        let pass = pass.get_or_insert_with(|| {
            let encoder = encoder.get_or_insert_with(|| self.encoder());
            encoder.begin_compute_pass(&ComputePassDescriptor::default()).forget_lifetime()
        });
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        let [x, y, z] = folded(*workgroups, self.bounds.workgroups);
        pass.dispatch_workgroups(x, y, z);
        *kernels += 1;
        batch.counts.kernels += 1;
        Ok(())
    }

    pub(super) fn encoder(&self) -> CommandEncoder {
        self.device.create_command_encoder(&CommandEncoderDescriptor::default())
    }

    pub(super) fn submit(&self, batch: &mut Batch) {
        drop(batch.pass.take());
        if let Some(encoder) = batch.encoder.take() {
            if !batch.params.is_empty() {
                batch.params.resize(batch.params.len().next_multiple_of(4), 0);
                self.queue.write_buffer(&self.params, 0, &batch.params);
            }
            let index = self.queue.submit([encoder.finish()]);
            batch.counts.submissions += 1;
            batch.reads.drain(..).for_each(|read| drop(read.set(index.clone())));
        }
        batch.params.clear();
        batch.kernels = 0;
        batch.number += 1;
        // Lets go of memory whose commands are done.
        let _ = self.device.poll(PollType::Poll);
    }

    /// Waits for all commands so far.
    pub(super) fn finish(&self) -> Result<()> {
        self.submit(&mut lock(&self.batch));
        let (tell, told) = oneshot::channel();
        self.queue.on_submitted_work_done(move || tell.send(()).unwrap_or_default());
        self.device.poll(PollType::wait_indefinitely()).map_err(|e| failed(&self.name, e))?;
        let done = wait(told)?;
        self.check()?;
        done.map_err(|e| failed(&self.name, e))
    }

    /// Gives the device up.
    pub(super) fn destroy(&self) {
        self.device.destroy();
    }

    /// What it has done so far.
    pub(super) fn counts(&self) -> Counts {
        let batch = lock(&self.batch);
        Counts { reads: self.reads.load(Ordering::Relaxed), ..batch.counts }
    }
}

/// What a device has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Kernels recorded.
    pub kernels: u64,
    /// Submissions of recorded kernels.
    pub submissions: u64,
    /// Reads that the host waited for.
    pub reads: u64,
}

/// `count` workgroups in three dimensions of at most `most`; there may be some more than asked for.
fn folded(count: usize, most: u32) -> [u32; 3] {
    let most = most as usize;
    let x = count.min(most);
    let y = count.div_ceil(x).min(most);
    [x as u32, y as u32, count.div_ceil(x * y) as u32]
}

#[cfg(test)]
mod tests {
    use flowtape_engine::backend::Pending;

    use super::super::{WgpuOptions, adapter};
    use super::*;

    #[test]
    fn a_lost_device_is_an_error_from_then_on() -> Result<()> {
        // Without an adapter there is none to lose; the adapters' own test says so.
        let Ok(gpu) = adapter::open(None, WgpuOptions::default()) else { return Ok(()) };
        let gpu = Arc::new(gpu);
        let memory = gpu.alloc(64)?;
        gpu.upload(memory.block(), &[1; 64])?;
        let read = || Box::new(gpu.read_later(memory.block(), 0..4)?).wait();
        assert_eq!(read()?, [1; 4]);
        gpu.destroy();
        assert!(matches!(read(), Err(Error::DeviceFailed { .. } | Error::OutOfMemory { .. })));
        let error = gpu.check().unwrap_err().to_string();
        assert!(error.contains("last checkpoint"), "{error}");
        assert!(gpu.finish().is_err());
        Ok(())
    }

    #[test]
    fn workgroups_are_folded_below_the_limit() {
        for count in [1, 65_535, 65_536, 1 << 20, (1 << 32) - 1, 65_535 * 65_535 + 1] {
            let [x, y, z] = folded(count, 65_535);
            assert!(x.max(y).max(z) <= 65_535);
            let all = x as usize * y as usize * z as usize;
            assert!(all >= count && all - count < x as usize * y as usize, "{count}: {x} {y} {z}");
        }
    }
}
